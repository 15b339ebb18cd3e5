"""One slow, obvious implementation per operator: the specification that every backend is tested against."""
