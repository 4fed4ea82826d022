package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// startSuite measures from a client's request at the gateway to the first byte of its answer, in three cases: cold (the image
// is absent), sandbox (the image is present, a sandbox stands in the pool) and warm (the Instance runs). Beside cold and
// sandbox stands process: the same program started bare from the same tree, without any container, to its first byte. Beside
// warm stands direct: the same request straight to the Instance.
func startSuite(ctx context.Context, o *Options, r *Report) error {
	return withStarter(ctx, o, r, func(s *starter) error {
		for round := range o.rounds(7, 30) {
			// A start from the pool and its bare process are soon measured, and differ by little: they are sampled twice.
			if err := s.round(ctx, round, s.process, s.sandbox, s.cold, s.process, s.sandbox); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		return s.warm(ctx, o.rounds(500, 3000))
	})
}

// starter is a stack with one Function deployed, and the same program in a plain tree.
type starter struct {
	o        *Options
	report   *Report
	stack    *machineStack
	bare     *bareProgram
	function string
}

func withStarter(ctx context.Context, o *Options, r *Report, run func(*starter) error) (err error) {
	name := o.Function
	if name == "" {
		name = "python"
	}
	memory, end, err := memoryDir(os.TempDir())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	fs, err := newScratch(ctx, memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fs.remove()) }()
	st, err := startStack(ctx, o, fs.Dir, stackOptions{registry: true, pool: 2})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.stop()) }()
	s := &starter{o: o, report: r, stack: st, function: name}
	layout, err := o.layout(ctx, name)
	if err != nil {
		return err
	}
	if s.bare, err = unpackBare(ctx, layout, fs.Dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.bare.remove()) }()
	if err := st.deploy(ctx, o, name); err != nil {
		return err
	}
	return run(s)
}

// round takes a sample of each of these kinds of start, beginning with another one each time.
func (s *starter) round(ctx context.Context, round int, kinds ...func(context.Context) error) error {
	for i := range kinds {
		if err := rest(ctx); err != nil {
			return err
		}
		if err := kinds[(i+round)%len(kinds)](ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *starter) process(ctx context.Context) error {
	took, err := s.bare.firstByte(ctx)
	if err != nil {
		return fmt.Errorf("start the bare process: %w", err)
	}
	s.add("cold", "process", took)
	s.add("sandbox", "process", took)
	s.o.say("process  %6.0f ms  the same program, bare", ms(took))
	return nil
}

func (s *starter) sandbox(ctx context.Context) error {
	if err := s.reset(ctx, false); err != nil {
		return err
	}
	took, err := s.first(ctx)
	if err != nil {
		return fmt.Errorf("start from the pool: %w", err)
	}
	s.add("sandbox", "hearth", took)
	s.o.say("sandbox  %6.0f ms  image present, sandbox from the pool", ms(took))
	return nil
}

func (s *starter) cold(ctx context.Context) error {
	if err := s.reset(ctx, true); err != nil {
		return err
	}
	took, err := s.first(ctx)
	if err != nil {
		return fmt.Errorf("start cold: %w", err)
	}
	s.add("cold", "hearth", took)
	s.o.say("cold     %6.0f ms  image absent", ms(took))
	return nil
}

// reset takes the Function back to where a start of its kind begins, on a machine at rest.
func (s *starter) reset(ctx context.Context, forget bool) error {
	return errors.Join(s.stack.reset(ctx, s.function, forget), rest(ctx))
}

// first asks the gateway, over a new connection.
func (s *starter) first(ctx context.Context) (time.Duration, error) {
	client := newClient()
	defer client.CloseIdleConnections()
	took, _, err := firstByte(ctx, client, s.stack.url(s.function), nil)
	return took, err
}

// warm asks gateway and Instance in turn, each over one connection that is kept.
func (s *starter) warm(ctx context.Context, requests int) error {
	address, err := s.stack.address(ctx, s.function)
	if err != nil {
		return err
	}
	s.o.say("warm     %d requests to the gateway and %d straight to the Instance, in turn", requests, requests)
	client := newClient()
	defer client.CloseIdleConnections()
	targets := []struct{ system, url string }{{"hearth", s.stack.url(s.function)}, {"direct", "http://" + address + "/"}}
	const settle = 50 // requests that open connections and fill caches
	for i := range requests + settle {
		for j := range targets {
			target := targets[(i+j)%len(targets)]
			took, _, err := firstByte(ctx, client, target.url, nil)
			if err != nil {
				return fmt.Errorf("warm request to %s: %w", target.system, err)
			}
			if i >= settle {
				s.add("warm", target.system, took)
			}
		}
	}
	return nil
}

func (s *starter) add(testCase, system string, took time.Duration) {
	s.report.Add(testCase, system, "first_byte", "ms", ms(took))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
