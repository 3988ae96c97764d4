"""Result files to tables and one-file HTML."""
