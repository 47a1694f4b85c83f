"""How a sweep stays cheap: what is reduced inside the graph, samples side by side, statistics within a budget."""
