"""Settings, in the form in which extensions add and read them."""


class OptionInfo:
    """One setting of the settings page."""

    def __init__(self, default=None, label="", component=None, component_args=None, *, section=None, refresh=None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section, self.refresh = section, refresh
        self.comment_after = ""

    def info(self, text):
        """Add a remark after the label."""
        self.comment_after += text
        return self


class Options:
    """Values by name; an unknown name raises AttributeError, as in the WebUI."""

    def __init__(self):
        self.data_labels, self.data = {}, {}

    def add_option(self, key, info):
        """Add a setting; its stored value stays."""
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


opts = Options()
