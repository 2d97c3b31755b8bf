"""Reports as HTML pages: drawings, tables and the style that all of them share."""
