"""Reading and writing files: images, results written whole or not at all, and checks of files that are not trusted."""
