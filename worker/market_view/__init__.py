"""What the pages of dashboard and account service show of the prediction market."""
