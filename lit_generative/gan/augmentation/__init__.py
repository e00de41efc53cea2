"""What real images and samples go through before the discriminator sees them."""
