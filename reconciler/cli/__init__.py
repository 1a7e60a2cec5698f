"""The face for people: parse arguments, call, render. `wiring` is the one place where real parts are put together."""
