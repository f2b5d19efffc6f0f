"""Tables and feature files to labelled patients, and these to folds."""
