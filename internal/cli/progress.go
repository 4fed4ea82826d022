package cli

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	drawPause = 100 * time.Millisecond
	drawAfter = time.Second // what takes less needs no bar
	barCells  = 30
)

// withProgress does something and shows how far it got, in bytes: as a bar if the user looks at it, now and then as a line if
// not.
func (a *app) withProgress(what string, total int64, done *atomic.Int64, do func() error) error {
	terminal, pause := isTerminal(a.err), progressPause
	if terminal {
		pause = drawPause
	}
	ended := make(chan error, 1)
	go func() { ended <- do() }()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	start := time.Now()
	for {
		select {
		case err := <-ended:
			if terminal {
				_, _ = fmt.Fprint(a.err, "\r\x1b[K")
			}
			return err
		case now := <-tick.C:
			line := bar(what, done.Load(), total, now.Sub(start))
			switch {
			case !terminal:
				a.note("%s", line)
			case now.Sub(start) >= drawAfter:
				_, _ = fmt.Fprint(a.err, "\r\x1b[K", line)
			}
		}
	}
}

// bar is a line of progress.
func bar(what string, done, total int64, took time.Duration) string {
	return fmt.Sprintf("%s  %s  %s of %s  %s", what, cells(done, total), megabytes(done), megabytes(total), rate(done, took))
}

// cells are a bar alone.
func cells(done, total int64) string {
	full := barCells
	if total > 0 {
		full = int(min(done, total) * barCells / total)
	}
	return strings.Repeat("█", full) + strings.Repeat("░", barCells-full)
}

func rate(bytes int64, took time.Duration) string {
	return megabytes(int64(float64(bytes)/max(took.Seconds(), 1e-3))) + "/s"
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
