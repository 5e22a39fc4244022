"""Files: images in, results out whole or not at all, and what is checked before an untrusted file is believed."""
