"""The database of textual inversions; reading the files asks for the expected width."""

from modules import shared
from modules.prompt_code import EmbeddingFiles


class EmbeddingDatabase(EmbeddingFiles):
    """The embeddings that fit the loaded checkpoint."""

    def get_expected_shape(self):
        return shared.sd_model.networks.tower.config.width

    def register_embedding(self, embedding, model):
        self.register_ids(model.cond_stage_model.tokenize([embedding.name])[0], embedding)
        return embedding

    def load_textual_inversion_embeddings(self, force_reload=False):
        self.expected_shape = self.get_expected_shape()
        self.read(lambda embedding: self.register_embedding(embedding, shared.sd_model))
