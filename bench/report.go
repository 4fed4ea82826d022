package bench

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// outcomeUnit is that of metrics which say how something ended: 1 is right and 0 is not.
const outcomeUnit = "right"

// alike is by how much two medians may differ that are as good as equal.
const alike = 0.005

// Report is the outcome of one run of a suite.
type Report struct {
	Suite   string  `json:"suite"`
	Machine Machine `json:"machine"`
	Rows    []Row   `json:"rows"`
	// Bounds that the suite must keep to, and whether it did.
	Bounds []Bound `json:"bounds,omitempty"`
	// notes are for people: what was left out, what peers were set to.
	notes []string
}

// Row is one metric of one system in one case. Quantiles are of the nearest rank, so each is a sample that was seen.
type Row struct {
	Case    string    `json:"case"`
	System  string    `json:"system"`
	Metric  string    `json:"metric"`
	Unit    string    `json:"unit"`
	N       int       `json:"n"`
	Min     float64   `json:"min"`
	P50     float64   `json:"p50"`
	P90     float64   `json:"p90"`
	P99     float64   `json:"p99"`
	Max     float64   `json:"max"`
	Samples []float64 `json:"samples"`
}

// Add files a sample under its case, system and metric. Rows stand in the order of their first sample.
func (r *Report) Add(testCase, system, metric, unit string, sample float64) {
	i := slices.IndexFunc(r.Rows, func(row Row) bool {
		return row.Case == testCase && row.System == system && row.Metric == metric
	})
	if i < 0 {
		r.Rows = append(r.Rows, Row{Case: testCase, System: system, Metric: metric, Unit: unit})
		i = len(r.Rows) - 1
	}
	r.Rows[i].add(sample)
}

func (row *Row) add(sample float64) {
	row.Samples = append(row.Samples, sample)
	sorted := slices.Sorted(slices.Values(row.Samples))
	row.N, row.Min, row.Max = len(sorted), sorted[0], sorted[len(sorted)-1]
	row.P50, row.P90, row.P99 = quantile(sorted, 0.5), quantile(sorted, 0.9), quantile(sorted, 0.99)
}

// quantile of sorted samples by nearest rank.
func quantile(sorted []float64, q float64) float64 {
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

// note says something that the reader of the table must know, once.
func (r *Report) note(text string) {
	if !slices.Contains(r.notes, text) {
		r.notes = append(r.notes, text)
	}
}

// Row finds a row, or nil.
func (r *Report) Row(testCase, system, metric string) *Row {
	for i := range r.Rows {
		if row := &r.Rows[i]; row.Case == testCase && row.System == system && row.Metric == metric {
			return row
		}
	}
	return nil
}

// WriteFile writes the report as JSON; an empty name writes nothing.
func (r *Report) WriteFile(name string) error {
	if name == "" {
		return nil
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	if err := os.WriteFile(name, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// WriteTable writes the report for people. The last column, in hearth's rows, has its median against those of its peers in the same
// case and metric, below 1 where hearth needs less; then come the cases in which it needs more than one of them.
func (r *Report) WriteTable(w io.Writer) error {
	fmt.Fprintf(w, "%s on %s\n\n", r.Suite, r.Machine)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "case\tmetric\tsystem\tunit\tn\tmin\tp50\tp90\tp99\tmax\tp50 against peers\t")
	rows := slices.Clone(r.Rows)
	order := func(row Row) int { return slices.IndexFunc(r.Rows, func(o Row) bool { return o.Case == row.Case }) }
	slices.SortStableFunc(rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(order(a), order(b)), strings.Compare(a.Metric, b.Metric))
	})
	var losses []string
	for _, row := range rows {
		scale, unit := human(row)
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t", row.Case, row.Metric, row.System, unit, row.N)
		for _, v := range []float64{row.Min, row.P50, row.P90, row.P99, row.Max} {
			fmt.Fprintf(t, "%s\t", number(v/scale))
		}
		against, lost := r.against(row)
		losses = append(losses, lost...)
		fmt.Fprintf(t, "%s\t\n", strings.Join(against, ", "))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, part := range []struct {
		title string
		lines []string
	}{{"Must hold", r.boundLines()}, {"Where hearth loses", losses}, {"Notes", r.notes}} {
		if len(part.lines) > 0 {
			fmt.Fprintf(w, "\n%s:\n  %s\n", part.title, strings.Join(part.lines, "\n  "))
		}
	}
	return nil
}

// against are the ratios of hearth's median to its peers', and the cases that it loses.
func (r *Report) against(row Row) (ratios, lost []string) {
	if row.System != "hearth" || row.Unit == outcomeUnit {
		return nil, nil
	}
	for _, peer := range r.Rows {
		if peer.Case != row.Case || peer.Metric != row.Metric || peer.System == "hearth" || peer.P50 <= 0 {
			continue
		}
		ratio := fmt.Sprintf("%.2f of %s", row.P50/peer.P50, peer.System)
		ratios = append(ratios, ratio)
		if row.P50 > peer.P50*(1+alike) && !isBound(peer.System) && row.Metric != "link_used" {
			lost = append(lost, fmt.Sprintf("%s %s: %s", row.Case, row.Metric, ratio))
		}
	}
	return ratios, lost
}

// human picks the unit that a person reads: bytes become MiB.
func human(row Row) (scale float64, unit string) {
	if row.Unit == "bytes" {
		return 1 << 20, "MiB"
	}
	return 1, row.Unit
}

// number with three significant digits or so.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
