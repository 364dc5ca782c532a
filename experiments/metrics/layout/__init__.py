"""How well images obey their layouts: judges trained on real scenes, and measures of their answers."""
