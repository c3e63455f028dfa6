//! Sizes of memory as people write them: `512M`, `2G`.

/// Parses a number of bytes: a whole number with `K`, `M`, `G` or `T` (powers of 1024) behind it.
///
/// A bare number is refused, since some programs take it for bytes and some for MiB.
pub fn parse(text: &str) -> Result<u64, String> {
    let expected =
        || "expected a whole number with K, M, G or T behind it, such as 512M".to_owned();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(expected()),
    };
    let number: u64 = digits.parse().map_err(|_| expected())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more than 64 bits can count".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        assert_eq!(parse("0K"), Ok(0));
        assert_eq!(parse("64k"), Ok(64 << 10));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("16777215T"), Ok(16_777_215 << 40));
    }

    #[test]
    fn everything_else_is_refused() {
        for text in
            ["", "M", "512", "-1M", "1.5G", "5 M", "12X", "16777216T", "9e9G", "MM1M", "é1é"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
