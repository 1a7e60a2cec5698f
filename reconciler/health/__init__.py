"""What is wrong that nobody planned: Observed × Agenda → incidents. Pure, like the planner."""
