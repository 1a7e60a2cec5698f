"""What is wrong that nobody planned: Observed and Agenda → incidents. Pure, like the planner."""
