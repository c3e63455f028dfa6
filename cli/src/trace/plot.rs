//! What `--stats-plot` draws: beside each other how many exits there were, and how long they took.

use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use common::trace::{Row, Stats};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::table::time_of;

/// The picture's width, and where its two charts begin.
const WIDTH: u32 = 1100;
const LABELS: u32 = 260;
const TIMES: u32 = 700;

/// The heights of the title, of a row, and of what stands below an axis.
const TITLE: u32 = 40;
const ROW: u32 = 24;
const AXIS: u32 = 44;

/// The most rows that there are: what has fewer exits is left out.
const ROWS: usize = 40;

/// A picture of `stats`: a row for each reason, device and address.
pub fn svg(stats: &Stats, ran: Duration) -> Result<String> {
    let mut rows = stats.table();
    let left_out = rows.len().saturating_sub(ROWS);
    rows.truncate(ROWS);
    let mut text = String::new();
    draw(&mut text, &rows, &caption(&stats.all(), ran, left_out))?;
    Ok(text)
}

fn caption(all: &Row, ran: Duration, left_out: usize) -> String {
    let (count, ran, sum) = (all.count, time_of(ran), time_of(all.sum));
    let mut caption = format!("{count} exits in {ran}, {sum} of it in the monitor");
    if left_out > 0 {
        caption += &format!(" ({left_out} more rows: --stats)");
    }
    caption
}

/// The powers of ten, in microseconds, between which all medians and percentiles are. Never an empty range, along
/// which the axis would look for its first label for ever.
fn span(rows: &[Row]) -> Range<f64> {
    let times = || rows.iter().flat_map(|row| [row.median, row.late]).map(micros);
    let least = times().reduce(f64::min).unwrap_or(1.0);
    let most = times().reduce(f64::max).unwrap_or(1.0);
    // A little more to the left, or the first power has no label.
    0.99 * 10_f64.powf(least.log10().floor())..10_f64.powf((most * 1.001).log10().ceil())
}

/// Not 0, which a logarithm has no place for.
fn micros(time: Duration) -> f64 {
    time.as_nanos().max(1) as f64 / 1e3
}

fn draw(text: &mut String, rows: &[Row], caption: &str) -> Result<()> {
    let most = rows.iter().map(|row| row.count).max().unwrap_or(0).max(1) as f64;
    let height = TITLE + AXIS + ROW * rows.len().max(1) as u32;
    let area = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let title = ("sans-serif", 18).into_font();
    area.draw_text(caption, &title.color(&BLACK), (14, 12))?;
    let (_, area) = area.split_vertically(TITLE);
    let (counts, times) = area.split_horizontally(TIMES);
    let (labels, counts) = counts.split_horizontally(LABELS);
    // From top to bottom, as the table.
    let (lines, font) = (rows.len().max(1) as f64..0.0, ("sans-serif", 13));

    let right_of =
        |colour: &RGBColor| font.into_font().color(colour).pos(Pos::new(HPos::Left, VPos::Center));
    for (at, row) in rows.iter().enumerate() {
        let place = (14 + 16 * i32::from(row.level), (ROW as usize * at) as i32 + ROW as i32 / 2);
        labels.draw_text(&row.what, &right_of(&BLACK), place)?;
    }

    // Room for the number behind the longest bar.
    let mut chart = ChartBuilder::on(&counts)
        .margin_right(20)
        .x_label_area_size(AXIS)
        .build_cartesian_2d(0.0..most * 1.25, lines.clone())?;
    let number = |count: &f64| format!("{count:.0}");
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .x_desc("exits")
        .x_labels(5)
        .x_label_formatter(&number)
        .label_style(font)
        .draw()?;
    for (at, row) in rows.iter().enumerate() {
        let (top, count) = (at as f64, row.count as f64);
        let colour = BLUE.mix([0.75, 0.5, 0.3][usize::from(row.level.min(2))]);
        let bar = Rectangle::new([(0.0, top + 0.2), (count, top + 0.8)], colour.filled());
        let share = format!("{} ({:.1} %)", row.count, 100.0 * row.share);
        let label = Text::new(share, (count + 0.01 * most, top + 0.5), right_of(&BLACK));
        chart.draw_series([bar])?;
        chart.draw_series([label])?;
    }

    let mut chart = ChartBuilder::on(&times)
        .margin_right(30)
        .x_label_area_size(AXIS)
        .build_cartesian_2d(span(rows).log_scale(), lines)?;
    let time = |micros: &f64| time_of(Duration::from_nanos((micros * 1e3).round() as u64));
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(BLACK.mix(0.06))
        .x_desc("the monitor's time for one exit: median (dot) to 99th percentile (bar)")
        .x_label_formatter(&time)
        .label_style(font)
        .draw()?;
    for (at, row) in rows.iter().enumerate() {
        let middle = at as f64 + 0.5;
        let (median, late) = (micros(row.median), micros(row.late));
        let line = |from: (f64, f64), to| PathElement::new(vec![from, to], RED.stroke_width(2));
        chart.draw_series([
            line((median, middle), (late, middle)),
            line((late, middle - 0.25), (late, middle + 0.25)),
        ])?;
        chart.draw_series([Circle::new((median, middle), 4, RED.filled())])?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(level: u8, what: &str, count: u64, median: u64) -> Row {
        let [median, late] = [median, 20 * median].map(Duration::from_nanos);
        let (what, share, sum) = (what.to_owned(), 0.5, late);
        Row { level, what, count, share, median, late, sum }
    }

    #[test]
    fn each_row_has_a_label_a_bar_and_a_dot() {
        let rows = [row(0, "port I/O", 700, 2_000), row(1, "<serial> port", 0, 0)];
        let mut text = String::new();
        draw(&mut text, &rows, "700 exits").unwrap();
        assert_eq!(text.matches("<circle").count(), 2, "{text}");
        assert!(text.contains("&lt;serial&gt; port") && text.contains("700 (50.0 %)"), "{text}");
        assert!(text.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn nothing_is_a_picture_too() {
        let text = svg(&Stats::default(), Duration::ZERO).unwrap();
        assert!(text.contains("0 exits in 0 ns") && text.trim_end().ends_with("</svg>"), "{text}");
    }

    #[test]
    fn the_axis_begins_and_ends_with_a_power_of_ten() {
        let near = |found: Range<f64>, from: f64, to: f64| {
            let close = |found: f64, expected: f64| (found / expected - 1.0).abs() < 0.02;
            assert!(close(found.start, from) && close(found.end, to), "{found:?}");
        };
        near(span(&[row(0, "a", 1, 2_000)]), 1.0, 100.0);
        near(span(&[row(0, "a", 1, 50)]), 0.01, 10.0);
        near(span(&[row(0, "a", 1, 0)]), 0.001, 0.01);
        near(span(&[]), 1.0, 10.0);
    }
}
