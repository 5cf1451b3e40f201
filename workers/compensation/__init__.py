"""What is put back: closed-form low-rank branches for the error that quantization leaves. `recipe.compensation` calls it."""
