"""What every stage stands on: errors, progress, console, workspace, card."""
