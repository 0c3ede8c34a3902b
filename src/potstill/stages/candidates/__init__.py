"""`generate --select`: several samples for each prompt of a data set, and what is selected from them."""
