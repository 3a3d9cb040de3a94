//! Charts of a study as SVG files: times against load, hit rates by policy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use plotters::prelude::*;

use super::policy::Policy;
use super::report::{Row, StudyReport};

/// Size of a chart, pixels.
const SIZE: (u32, u32) = (900, 520);

/// A chart could not be written.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The file or its folder could not be written.
    #[error("cannot write {path}: {source}; give a folder that can be written", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It could not be drawn.
    #[error("cannot draw {what}: {problem}")]
    Draw {
        /// Which chart.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// Writes `ttft-mean.svg`, `ttft-p99.svg` and `hit-rate.svg` into the folder, which is made if there is none. Returns their paths.
pub fn write_plots(report: &StudyReport, folder: &Path) -> Result<Vec<PathBuf>, PlotError> {
    fs::create_dir_all(folder).map_err(|source| PlotError::Io { path: folder.to_owned(), source })?;
    let charts: [(&str, String); 3] = [
        ("ttft-mean.svg", lines(report, "mean time to first token, ms", |row| row.ttft_mean_ms)?),
        ("ttft-p99.svg", lines(report, "99th percentile of time to first token, ms", |row| row.ttft_p99_ms)?),
        ("hit-rate.svg", bars(report)?),
    ];
    let mut paths = Vec::new();
    for (name, svg) in charts {
        let path = folder.join(name);
        fs::write(&path, svg).map_err(|source| PlotError::Io { path: path.clone(), source })?;
        paths.push(path);
    }
    Ok(paths)
}

fn policies(report: &StudyReport) -> Vec<&'static str> {
    let has = |name: &&str| report.rows.iter().any(|row| row.policy == *name);
    Policy::ALL.into_iter().map(Policy::name).filter(has).collect()
}

/// A line per policy over the loads; the times on a logarithmic axis, for they go from tenths of seconds to minutes.
fn lines(report: &StudyReport, what: &'static str, value: fn(&Row) -> f64) -> Result<String, PlotError> {
    let values = || report.rows.iter().map(value).filter(|value| *value > 0.0);
    let loads = || report.rows.iter().map(|row| row.load);
    let least = |all: &mut dyn Iterator<Item = f64>| all.fold(f64::INFINITY, f64::min);
    let most = |all: &mut dyn Iterator<Item = f64>| all.fold(0.0, f64::max);
    let (low, high) = (least(&mut values()).min(1e9) * 0.8, most(&mut values()).max(1.0) * 1.25);
    let (left, right) = (least(&mut loads()).min(1e9), most(&mut loads()));
    let mut svg = String::new();
    let draw = |svg: &mut String| -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{}: {what}", report.trace), ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(left * 0.98..right * 1.02 + 1e-3, (low..high).log_scale())?;
        chart
            .configure_mesh()
            .x_desc("load, times as recorded")
            .y_desc("ms")
            .light_line_style(WHITE)
            .draw()?;
        for (number, policy) in policies(report).into_iter().enumerate() {
            let color = Palette99::pick(number).to_rgba();
            let width = if policy == Policy::Ours.name() { 4 } else { 2 };
            let points: Vec<(f64, f64)> = report
                .rows
                .iter()
                .filter(|row| row.policy == policy)
                .map(|row| (row.load, value(row)))
                .collect();
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(width)).point_size(3))?
                .label(policy)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(width)));
        }
        let background = WHITE.mix(0.8);
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(background)
            .border_style(BLACK)
            .draw()?;
        area.present()?;
        Ok(())
    };
    draw(&mut svg).map_err(|error| PlotError::Draw { what, problem: error.to_string() })?;
    Ok(svg)
}

/// A bar per policy and load, beside each other, and the ideal as a line.
fn bars(report: &StudyReport) -> Result<String, PlotError> {
    let what = "share of prompt tokens that were cached";
    let names = policies(report);
    let mut loads: Vec<f64> = report.rows.iter().map(|row| row.load).collect();
    loads.sort_by(f64::total_cmp);
    loads.dedup();
    let width = 0.8 / loads.len().max(1) as f64;
    let mut svg = String::new();
    let draw = |svg: &mut String| -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{}: {what}", report.trace), ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..names.len() as f64, 0.0..1.0)?;
        let label =
            |x: &f64| if x.fract() == 0.0 { names.get(*x as usize).copied().unwrap_or_default() } else { "" };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(names.len() + 1)
            .x_label_formatter(&|x| label(x).to_owned())
            .y_label_formatter(&|y| format!("{:.0} %", y * 100.0))
            .draw()?;
        for row in &report.rows {
            let (Some(name), Some(load)) = (
                names.iter().position(|name| *name == row.policy),
                loads.iter().position(|load| *load == row.load),
            ) else {
                continue;
            };
            let left = name as f64 + 0.1 + load as f64 * width;
            let color = Palette99::pick(load).filled();
            chart.draw_series([Rectangle::new([(left, 0.0), (left + width * 0.9, row.hit_share)], color)])?;
        }
        let ideal = [(0.0, report.ideal_hit_share), (names.len() as f64, report.ideal_hit_share)];
        chart.draw_series(LineSeries::new(ideal, BLACK.stroke_width(2)))?;
        area.present()?;
        Ok(())
    };
    draw(&mut svg).map_err(|error| PlotError::Draw { what, problem: error.to_string() })?;
    Ok(svg)
}
