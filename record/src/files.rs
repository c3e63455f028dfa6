//! The files that are made of a recording.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cli::cast::{Cast, LIMIT};
use common::file;

use crate::film::{Film, TICK};
use crate::raster::Painter;
use crate::svg;

/// Writes a file, whole or not at all.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, bytes)
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a recording, and makes its pictures.
pub fn read(path: &Path, idle: Option<Duration>) -> Result<(Film, String)> {
    let read = || {
        let bytes = file::read(path, LIMIT)?;
        let film = Film::of(&Cast::parse(&bytes)?, idle)?;
        Ok((film, fingerprint(&bytes)))
    };
    let read: Result<_> = read();
    read.with_context(|| format!("recording {}", path.display()))
}

/// What an MP4 says of the recording that it was made from.
fn fingerprint(cast: &[u8]) -> String {
    format!("asciicast {}", &blake3::hash(cast).to_hex()[..32])
}

/// The files that are text, and so the same wherever they are made: their names and what is in them.
pub fn texts(film: &Film, stem: &str) -> Vec<(String, String)> {
    vec![
        (format!("{stem}.svg"), svg::animated(film)),
        (format!("{stem}.still.svg"), svg::still(film, &film.frames[film.poster])),
        (format!("{stem}.ko.vtt"), vtt(film, |caption| &caption.ko)),
        (format!("{stem}.en.vtt"), vtt(film, |caption| &caption.en)),
    ]
}

/// The captions of one language as WebVTT, for a player that shows them itself.
fn vtt(film: &Film, language: impl Fn(&crate::film::Caption) -> &str) -> String {
    let time = |at: Duration| {
        let ms = at.as_millis();
        format!("{:02}:{:02}.{:03}", ms / 60_000, ms / 1000 % 60, ms % 1000)
    };
    let mut text = "WEBVTT\n".to_owned();
    for caption in film.captions.iter().filter(|caption| !language(caption).is_empty()) {
        let words = language(caption).replace('&', "&amp;").replace('<', "&lt;");
        let words = words.replace("-->", "--&gt;");
        let (from, to) = (time(caption.from), time(caption.to));
        text.push_str(&format!("\n{from} --> {to}\n{words}\n"));
    }
    text
}

/// Draws the picture that is seen `at` this moment, as a PNG.
pub fn png(film: &Film, at: Duration, path: &Path) -> Result<()> {
    let tick = (at.as_secs_f64() / TICK.as_secs_f64()) as u32;
    let place = film.frames.partition_point(|frame| frame.from <= tick).saturating_sub(1);
    let picture = Painter::new(film)?.paint(&film.frames[place])?;
    write(path, &picture.encode_png().context("no PNG")?)
}

/// Makes the film: H.264 in an MP4, which every browser plays while it is still being fetched.
pub fn mp4(film: &Film, made_from: &str, path: &Path, mut done: impl FnMut(u32)) -> Result<()> {
    let mut painter = Painter::new(film)?;
    let (width, height) = painter.size();
    let part = path.with_extension("part.mp4");
    let mut ffmpeg = Command::new("ffmpeg");
    ffmpeg.args(["-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgba"]);
    ffmpeg.args(["-video_size", &format!("{width}x{height}")]);
    ffmpeg.args(["-framerate", &format!("{}", 1.0 / TICK.as_secs_f64()), "-i", "-"]);
    ffmpeg.args(["-c:v", "libx264", "-preset", "slower", "-crf", "34"]);
    // A picture that all others build on every 30 seconds: that is how exactly one can jump.
    ffmpeg.args(["-g", "300", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]);
    // What is made of the same is to be the same.
    ffmpeg.args(["-threads", "2", "-fflags", "+bitexact", "-flags:v", "+bitexact"]);
    ffmpeg.args(["-map_metadata", "-1", "-metadata", &format!("comment={made_from}")]);
    ffmpeg.arg(&part).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = ffmpeg.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!("no ffmpeg: run `cargo xtask setup --record`"),
        _ => anyhow::Error::from(error).context("cannot start ffmpeg"),
    })?;
    let mut pictures = child.stdin.take().expect("stdin is a pipe");
    let ends = film.frames.iter().skip(1).map(|frame| frame.from).chain([film.ticks]);
    let draw = || -> Result<()> {
        for (frame, end) in film.frames.iter().zip(ends) {
            let picture = painter.paint(frame)?;
            for _ in frame.from..end {
                // Why it reads no more it says below.
                if pictures.write_all(picture.data()).is_err() {
                    return Ok(());
                }
            }
            done(100 * end / film.ticks.max(1));
        }
        Ok(())
    };
    let drawn = draw();
    drop(pictures);
    let output = child.wait_with_output().context("cannot wait for ffmpeg")?;
    drawn?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("ffmpeg: {}", said.lines().last().unwrap_or("it gives no reason"));
    }
    fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display()))
}

/// What is wrong with the files that were made of a recording.
pub fn faults(cast: &Path) -> Result<Vec<String>> {
    let (film, made_from) = read(cast, None)?;
    let stem = stem(cast)?;
    let beside = |name: &str| cast.with_file_name(name);
    let mut faults = Vec::new();
    for (name, text) in texts(&film, &stem) {
        match fs::read(beside(&name)) {
            Ok(bytes) if bytes == text.as_bytes() => {}
            Ok(_) => faults.push(format!("{name} was not made from {stem}.cast")),
            Err(error) => faults.push(format!("{name}: {error}")),
        }
    }
    let name = format!("{stem}.mp4");
    match fs::read(beside(&name)) {
        Ok(bytes) if bytes.windows(made_from.len()).any(|part| part == made_from.as_bytes()) => {}
        Ok(_) => faults.push(format!("{name} was not made from {stem}.cast")),
        Err(error) => faults.push(format!("{name}: {error}")),
    }
    Ok(faults)
}

/// A file's name without folder and ending.
pub fn stem(path: &Path) -> Result<String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    Ok(stem.with_context(|| format!("{} has no name", path.display()))?.to_owned())
}

/// The files of a folder that end so, by name.
pub fn with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
    found.sort();
    ensure!(!found.is_empty(), "no .{extension} in {}", folder.display());
    Ok(found)
}

#[cfg(test)]
mod tests {
    use cli::cast::{Event, Header};

    use super::*;

    /// A recording of a second and a half in a folder of its own.
    fn recorded() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("short.cast");
        let at = |ms, event| (Duration::from_millis(ms), event);
        let cast = Cast {
            header: Header { poster: Some(1.0), ..Header::new(40, 10) },
            events: vec![
                at(0, Event::Marker("가 & <나>\na --> b".into())),
                at(500, Event::Output("\x1b[1;32m한글\x1b[m text \u{2500}\u{7}".into())),
                at(1500, Event::Input("Ctrl-A s".into())),
            ],
        };
        fs::write(&path, cast.written().unwrap()).unwrap();
        (dir, path)
    }

    #[test]
    fn the_same_recording_gives_the_same_pictures_and_captions() {
        let (_dir, path) = recorded();
        let made = || texts(&read(&path, None).unwrap().0, "short");
        let files = made();
        assert_eq!(files, made());
        let [(_, moving), (_, still), (_, ko), (_, en)] = &files[..] else { panic!("{files:?}") };
        assert_eq!(ko, "WEBVTT\n\n00:00.000 --> 00:03.900\n가 &amp; &lt;나>\n");
        assert!(en.ends_with("\na --&gt; b\n"), "{en}");
        assert!(still.contains(">가 &amp; &lt;나&gt;</text>") && !still.contains("Ctrl-A s"));
        assert!(moving.contains(">Ctrl-A s</text>") && moving.contains("@keyframes"));
    }

    #[test]
    fn a_film_says_which_recording_it_was_made_from() {
        let (_dir, path) = recorded();
        let (film, made_from) = read(&path, None).unwrap();
        for (name, text) in texts(&film, "short") {
            fs::write(path.with_file_name(name), text).unwrap();
        }
        let to = path.with_extension("mp4");
        if let Err(error) = mp4(&film, &made_from, &to, |_| {}) {
            // Only what `cargo xtask setup --record` brings may be missing.
            assert!(error.to_string().contains("setup --record"), "{error:#}");
            eprintln!("skipped: {error}");
            return;
        }
        assert_eq!(faults(&path).unwrap(), Vec::<String>::new());
        let first = fs::read(&to).unwrap();
        mp4(&film, &made_from, &to, |_| {}).unwrap();
        assert!(first == fs::read(&to).unwrap(), "the same recording gives another film");
        // Another recording: nothing of what is there was made from it.
        let text = fs::read_to_string(&path).unwrap().replace("text", "test");
        fs::write(&path, text).unwrap();
        let faults = faults(&path).unwrap();
        assert_eq!(faults.len(), 3, "{faults:?}");
        assert!(faults[2].contains("short.mp4 was not made from short.cast"), "{faults:?}");
    }
}
