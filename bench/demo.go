package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/hearth-serverless/hearth/gateway"
	"github.com/hearth-serverless/hearth/internal/waterfall"
)

const demoRounds = 5

// demoSuite is the start suite, told as a story: few rounds, and at the end where one cold start spent its time.
func demoSuite(ctx context.Context, o *Options, r *Report) error {
	return withStarter(ctx, o, r, func(s *starter) error {
		o.say("starting %s %d times cold and from the pool; beside it the bare process", s.function, demoRounds)
		for round := range demoRounds {
			if err := s.round(ctx, round, s.process, s.sandbox, s.cold); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		// Before others have the image too, which then would not be absent.
		if err := s.waterfall(ctx); err != nil {
			return err
		}
		for _, degree := range []string{fromRuntime, fromRevision} {
			if err := s.degree(ctx, degree); err != nil {
				return fmt.Errorf("start from a %s: %w", degree, err)
			}
		}
		return s.warm(ctx, 500)
	})
}

// degree takes the samples of a degree of warmth beyond the sandbox: the same Function as code in a Runtime that is booted, or its
// Revision frozen. What this build cannot do is told below the table.
func (s *starter) degree(ctx context.Context, degree string) (err error) {
	o := *s.o
	o.Function = s.function
	c := handoffCase{ofImage, degree, 1}
	row := "frozen"
	if degree == fromRuntime {
		c.runtime, row = s.function, "runtime"
		if s.function == "go" {
			c.runtime = "native"
		}
	}
	if !slices.Contains(append(Runtimes(), ofImage), c.runtime) {
		s.report.note(fmt.Sprintf("%s: left out, there is no runtime for %s", row, s.function))
		return nil
	}
	if err := s.reset(ctx, false); err != nil {
		return err
	}
	h := &handoff{o: &o, report: s.report, stack: s.stack, client: newClient()}
	defer h.client.CloseIdleConnections()
	functions, err := h.deploy(ctx, c)
	defer func() { err = errors.Join(err, h.retire(context.WithoutCancel(ctx), c, functions)) }()
	if err == nil && degree == fromRevision { // all at once: that takes a while, and each round starts another
		_, err = h.freeze(ctx, functions)
	}
	for round := 0; round < demoRounds && err == nil; round++ {
		k := round % len(functions)
		err = s.warmStart(ctx, h, c, functions[k:k+1], row)
	}
	if errors.Is(err, errMissing) {
		s.report.note(fmt.Sprintf("%s: left out, %v", row, err))
		return nil
	}
	return err
}

// warmStart takes one sample of a Function, over a new connection as all of them here.
func (s *starter) warmStart(ctx context.Context, h *handoff, c handoffCase, functions []string, row string) error {
	warm, err := h.begin(ctx, c, functions)
	if err != nil {
		return err
	}
	if err := rest(ctx); err != nil {
		return err
	}
	client := newClient()
	defer client.CloseIdleConnections()
	took, _, err := firstByte(ctx, client, s.stack.url(functions[0]), nil)
	if err != nil {
		return err
	}
	s.add(row, "hearth", took)
	s.o.say("%-8s %6.0f ms", row, ms(took))
	return h.servedBy(ctx, c, functions, warm)
}

// waterfall draws one more cold start, traced by every daemon on its way.
func (s *starter) waterfall(ctx context.Context) error {
	if err := s.reset(ctx, true); err != nil {
		return err
	}
	client := newClient()
	defer client.CloseIdleConnections()
	took, header, err := firstByte(ctx, client, s.stack.url(s.function), http.Header{gateway.TraceHeader: {"1"}})
	if err != nil {
		return fmt.Errorf("trace a cold start: %w", err)
	}
	phases, err := gateway.ParseTiming(header.Values("Server-Timing"))
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	chart := waterfall.Chart{Title: fmt.Sprintf("one cold start of %s: %.0f ms to the first byte", s.function, ms(took))}
	for _, p := range phases {
		seen[p.Name] = true
		chart.Phases = append(chart.Phases, waterfall.Phase(p))
	}
	wanted := []string{"resolve", "fetch", "decompress", "unpack", "sandbox", "create", "process", "first_byte"}
	if missing := slices.DeleteFunc(wanted, func(name string) bool { return seen[name] }); len(missing) > 0 {
		return fmt.Errorf("the trace of a cold start lacks %v; it has %v", missing, phases)
	}
	fmt.Fprintln(s.o.Progress)
	return chart.Write(s.o.Progress)
}
