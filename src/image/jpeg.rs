//! Whether a JPEG file is all there.

use std::io::{self, BufRead, Read};

/// Decoders make up what a JPEG that was cut short lacks, in grey, and say nothing. It is whole if its end marker comes, which the data of
/// a picture cannot hold; that of a thumbnail within a segment does not count.
pub(super) fn is_whole(mut file: impl BufRead) -> io::Result<bool> {
    while let Some(marker) = next_marker(&mut file)? {
        match marker {
            0xd9 => return Ok(true),
            // Data that looks like a marker, and markers without a segment.
            0x00 | 0x01 | 0xd0..=0xd8 => {}
            _ => {
                let mut length = [0; 2];
                if file.read_exact(&mut length).is_err() {
                    return Ok(false);
                }
                // The length counts itself.
                let rest = u64::from(u16::from_be_bytes(length)).saturating_sub(2);
                io::copy(&mut file.by_ref().take(rest), &mut io::sink())?;
            }
        }
    }
    Ok(false)
}

/// What follows the next 0xff, or several of them.
fn next_marker(file: &mut impl BufRead) -> io::Result<Option<u8>> {
    file.skip_until(0xff)?;
    file.bytes().find(|byte| !matches!(byte, Ok(0xff))).transpose()
}
