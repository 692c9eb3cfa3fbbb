"""The pytest plugin: `plugin` is what pytest loads."""
