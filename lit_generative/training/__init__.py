"""What training every family needs: the base module, exact resume, schedules, safe checkpoint files, logs."""
