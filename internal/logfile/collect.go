package logfile

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Source is a pipe's end.
type Source interface {
	io.Reader
	SetReadDeadline(t time.Time) error
}

// idle is how long a line may be without its end before it is written nevertheless.
const idle = time.Second

// readBytes is how much is read at once; a limiter's burst has to be as much.
const readBytes = 32 << 10

// Collect writes what comes from sources until each has ended. It reads no faster than pace allows, so that who writes faster waits;
// when ctx is done, it reads what is left at once.
func Collect(ctx context.Context, w *Writer, pace *rate.Limiter, sources ...Source) error {
	var work sync.WaitGroup
	errs := make([]error, len(sources))
	for n, source := range sources {
		work.Go(func() { errs[n] = collect(ctx, w.Stream(), pace, source) })
	}
	work.Wait()
	return errors.Join(errs...)
}

func collect(ctx context.Context, to *Stream, pace *rate.Limiter, from Source) error {
	defer to.Flush()
	block := make([]byte, readBytes)
	for {
		var deadline time.Time
		if to.Held() {
			deadline = time.Now().Add(idle)
		}
		_ = from.SetReadDeadline(deadline) // of one that has ended, Read says so
		n, err := from.Read(block)
		_ = pace.WaitN(ctx, n) // an error is ctx's end
		to.Write(block[:n])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			to.Flush()
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}
