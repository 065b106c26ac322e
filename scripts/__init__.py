"""The scripts of this repository and the programs behind them."""
