"""Numbers to figures: nothing else imports matplotlib."""
