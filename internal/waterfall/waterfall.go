// Package waterfall draws the phases of a start as bars of text over one time axis, so that what overlaps is seen to overlap.
package waterfall

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// DefaultWidth is the width of the time axis in columns when Chart.Width is zero.
const DefaultWidth = 48

// Phase is one bar.
type Phase struct {
	Name     string
	Offset   time.Duration // from the beginning of the start
	Duration time.Duration
	Busy     time.Duration // time spent working within Duration; 0 when not known
}

// Chart is what Write draws. The zero value of its options is useful.
type Chart struct {
	Title  string
	Phases []Phase // in any order; drawn by offset
	Width  int     // columns of the time axis; 0 is DefaultWidth
	ASCII  bool    // bars of '#' instead of block characters
}

// Write draws the chart. Negative offsets and durations are drawn as zero; without phases it says so.
func (c Chart) Write(w io.Writer) error {
	var b strings.Builder
	if c.Title != "" {
		fmt.Fprintln(&b, c.Title)
	}
	if len(c.Phases) == 0 {
		fmt.Fprintln(&b, "  (no phases)")
	} else {
		c.draw(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (c Chart) draw(b *strings.Builder) {
	phases := c.sorted()
	total, nameWidth, busy := measure(phases)
	width := c.Width
	if width <= 0 {
		width = DefaultWidth
	}
	busyHead := ""
	if busy {
		busyHead = fmt.Sprintf("  %9s", "busy")
	}
	end := format(total)
	axis := "0" + strings.Repeat(" ", max(1, width-1-utf8.RuneCountInString(end))) + end
	fmt.Fprintf(b, "  %-*s  %9s  %9s%s  %s\n", nameWidth, "phase", "from", "took", busyHead, axis)
	for _, p := range phases {
		busyText := ""
		if busy {
			busyText = fmt.Sprintf("  %9s", "")
			if p.Busy > 0 {
				busyText = fmt.Sprintf("  %9s", format(p.Busy))
			}
		}
		line := fmt.Sprintf("  %-*s  %9s  %9s%s  %s", nameWidth, p.Name, format(p.Offset), format(p.Duration), busyText, c.bar(p, total, width))
		fmt.Fprintln(b, strings.TrimRight(line, " "))
	}
}

// sorted returns the phases by offset, without what is negative.
func (c Chart) sorted() []Phase {
	phases := slices.Clone(c.Phases)
	for i := range phases {
		p := &phases[i]
		p.Offset, p.Duration = max(0, p.Offset), max(0, p.Duration)
	}
	slices.SortStableFunc(phases, func(a, b Phase) int { return cmp.Compare(a.Offset, b.Offset) })
	return phases
}

// measure finds the end of the axis, the width of the column of names, and whether any busy time is known.
func measure(phases []Phase) (total time.Duration, nameWidth int, busy bool) {
	nameWidth = len("phase")
	for _, p := range phases {
		total = max(total, p.Offset+p.Duration)
		nameWidth = max(nameWidth, utf8.RuneCountInString(p.Name))
		busy = busy || p.Busy > 0
	}
	return total, nameWidth, busy
}

// bar draws a phase in eighths of a column; what is too short to be seen gets the thinnest mark.
func (c Chart) bar(p Phase, total time.Duration, width int) string {
	if total <= 0 {
		return ""
	}
	from := float64(p.Offset) / float64(total) * float64(width)
	long := float64(p.Duration) / float64(total) * float64(width)
	column := min(int(from), width-1)
	room := width - column
	if c.ASCII {
		return strings.Repeat(" ", column) + strings.Repeat("#", min(room, max(1, int(math.Round(long)))))
	}
	eighths := min(room*8, max(1, int(math.Round(long*8))))
	text := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		text += string([]rune("▏▎▍▌▋▊▉")[rest-1])
	}
	return strings.Repeat(" ", column) + text
}

// format writes a duration with three significant digits, in ms below 10 s.
func format(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms < 0.01:
		return "0 ms"
	case ms < 10:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 10000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", ms/1000)
}
