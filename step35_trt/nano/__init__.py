"""nano: a small trained Step 3.5 with every feature of the large one, shipped as package data."""
