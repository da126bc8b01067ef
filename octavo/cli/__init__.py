"""The command line: `octavo serve | chat | run | pull | list | rm | plan | bench`."""
