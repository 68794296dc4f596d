"""From a corpus to windows of token ids; knows no network."""
