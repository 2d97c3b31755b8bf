"""Running a bundle: sessions, sampling, drafting, text, chat and batches."""
