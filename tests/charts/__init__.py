"""What tests of the Helm charts share: tools, renderings, and the rules that rendered objects are held against."""
