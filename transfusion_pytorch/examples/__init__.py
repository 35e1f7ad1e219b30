"""What the example scripts share: data that needs no download, a judge of what was drawn, pictures, and their runs."""
