"""What turns the sources into the notebook, README, RESULTS and the kept measurements."""
