"""The colours of all figures."""

OUR_COLOUR, GREY, INK = "#d1495b", "#8d99ae", "#2b2d42"
