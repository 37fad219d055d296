"""What every package uses: errors, runtime settings, progress, tables, plots."""
