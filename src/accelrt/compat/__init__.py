"""Other vendors' programming interfaces on accelrt: scripts run with their import line changed."""
