"""What makes a notebook a lesson: predictions, questions, and verdicts on the guide's claims."""
