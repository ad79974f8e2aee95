"""What a repository on the Hub holds: its weights read safely, its card, and one commit that publishes them."""
