"""The runner: a SchedulerOutput becomes arrays, a Program runs on them, tokens come back."""
