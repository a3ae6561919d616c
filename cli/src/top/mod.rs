//! The screen of `msb top`: [`model`] is what it knows and what keys mean, [`view`] draws it, [`screen`] and [`keys`] are the terminal.
//! The loop around them is `commands::top`.

pub mod keys;
pub mod model;
pub mod screen;
pub mod view;

#[cfg(test)]
mod tests;
