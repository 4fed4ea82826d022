package disk

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Measured is what reads past all caches of this machine take. What a host below it keeps in memory is as fast as that.
type Measured struct {
	// BytesPerSecond with reads of 1 MiB, eight of them under way.
	BytesPerSecond float64 `json:"bytes_per_second"`
	// Latency of one read of 4 KiB, the median.
	Latency time.Duration `json:"latency"`
}

// String is for people.
func (m Measured) String() string {
	return fmt.Sprintf("%.0f MB/s with 8 reads of 1 MiB under way, %.2f ms for one of 4 KiB", m.BytesPerSecond/1e6, m.Latency.Seconds()*1e3)
}

const (
	measuredBytes = 64 << 20
	bigRead       = 1 << 20
	bigReads      = 8 // under way
	smallRead     = 4 << 10
	smallReads    = 200
)

// Measure writes a file, reads it, and removes it.
func (d *Disk) Measure(ctx context.Context) (m Measured, err error) {
	path := filepath.Join(d.Dir, "measured")
	defer func() {
		if err = errors.Join(err, os.Remove(path)); err != nil {
			err = fmt.Errorf("measure a disk: %w", err)
		}
	}()
	if err := writeRandom(path); err != nil {
		return m, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return m, err
	}
	defer f.Close()
	if m.Latency, err = latency(ctx, f); err != nil {
		return m, err
	}
	began := time.Now()
	if err := readAll(ctx, f); err != nil {
		return m, err
	}
	m.BytesPerSecond = measuredBytes / time.Since(began).Seconds()
	return m, nil
}

// writeRandom writes what nothing below can leave out.
func writeRandom(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	data := make([]byte, bigRead)
	for range measuredBytes / bigRead {
		_, _ = rand.Read(data) // it never fails
		if _, err := f.Write(data); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

func latency(ctx context.Context, f *os.File) (time.Duration, error) {
	data, end, err := aligned(smallRead)
	if err != nil {
		return 0, err
	}
	defer end()
	took := make([]time.Duration, smallReads)
	for i := range took {
		at := mathrand.Int64N(measuredBytes/smallRead) * smallRead
		began := time.Now()
		if _, err := f.ReadAt(data, at); err != nil {
			return 0, err
		}
		took[i] = time.Since(began)
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

func readAll(ctx context.Context, f *os.File) error {
	var next atomic.Int64
	readers, ctx := errgroup.WithContext(ctx)
	for range bigReads {
		readers.Go(func() error {
			data, end, err := aligned(bigRead)
			if err != nil {
				return err
			}
			defer end()
			for ctx.Err() == nil {
				at := next.Add(bigRead) - bigRead
				if at >= measuredBytes {
					return nil
				}
				if _, err := f.ReadAt(data, at); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
	}
	return readers.Wait()
}

// aligned is memory as direct I/O wants it.
func aligned(bytes int) (data []byte, end func(), err error) {
	if data, err = unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return nil, nil, fmt.Errorf("map memory: %w", err)
	}
	return data, func() { _ = unix.Munmap(data) }, nil
}
