//! CRC-32C (Castagnoli), as EROFS superblocks and our index files carry it.
//!
//! A table of 256 entries is enough: the inputs are a few megabytes at most.

const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ POLYNOMIAL } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

/// The raw register after `bytes`, started from `seed`, without the final inversion (what the kernel's `crc32c()` computes).
pub(crate) fn update(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |value, byte| (value >> 8) ^ TABLE[usize::from((value as u8) ^ byte)])
}

/// The usual CRC-32C of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !update(!0, bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_value_of_the_catalogue_comes_out() {
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
    }
}
