"""What a bundle is, for people: its steps as a table and as drawings, on a terminal and as a page."""
