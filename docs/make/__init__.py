"""What is made for the site: links, formulas, and (by command) pages and pictures."""
