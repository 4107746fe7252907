"""The rehearsal of a T4: the notebook under its limits, section by section, and what that says of a real one."""
