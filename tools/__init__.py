"""What turns the sources into the notebook, the README and the kept measurements."""
