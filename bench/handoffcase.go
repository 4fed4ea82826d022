package bench

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ofImage stands where a Runtime's name does in the cases of Functions that are images.
const ofImage = "image"

// Degrees of warmth, as cases name them.
const (
	fromSandbox  = "sandbox"
	fromRuntime  = "runtime"
	fromRevision = "revision"
)

// mostAtOnce bounds how many starts a case may ask for at once: so many Instances, and as many plain pods, have to fit the machine.
const mostAtOnce = 100

// handoffCase is what is handed over (a Function of a Runtime, or of an image), how warm it is, and how many at once.
type handoffCase struct {
	runtime, degree string
	n               int
}

func (c handoffCase) String() string { return fmt.Sprintf("%s/%s/%d", c.runtime, c.degree, c.n) }

// functions that the case needs. Starts that follow one another have several Functions too where it takes long until one can be
// started again.
func (c handoffCase) functions() int {
	if c.n == 1 && c.degree == fromRevision {
		return 4
	}
	return c.n
}

// plain is the sample image whose pod is the same Function without Hearth.
func (c handoffCase) plain(function string) string {
	switch c.runtime {
	case ofImage:
		return function
	case "native":
		return "go"
	}
	return c.runtime
}

// parseHandoffCase reads RUNTIME/DEGREE/N.
func parseHandoffCase(s string) (handoffCase, error) {
	runtime, rest, _ := strings.Cut(s, "/")
	degree, number, _ := strings.Cut(rest, "/")
	degrees := []string{fromRuntime, fromRevision}
	if runtime == ofImage {
		degrees = []string{fromSandbox, fromRevision}
	}
	if runtimes := append([]string{ofImage}, Runtimes()...); !slices.Contains(runtimes, runtime) {
		return handoffCase{}, fmt.Errorf("case %q: want RUNTIME/DEGREE/N, where RUNTIME is one of %s", s, strings.Join(runtimes, ", "))
	}
	if !slices.Contains(degrees, degree) {
		return handoffCase{}, fmt.Errorf("case %q: want %s/DEGREE/N, where DEGREE is one of %s", s, runtime, strings.Join(degrees, ", "))
	}
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || n > mostAtOnce {
		return handoffCase{}, fmt.Errorf("case %q: want %s/%s/N, where N is 1 to %d", s, runtime, degree, mostAtOnce)
	}
	return handoffCase{runtime, degree, n}, nil
}

// Runtimes that hand-offs are measured with.
func Runtimes() []string { return []string{"python", "java", "node", "native"} }

// handoffCases are those that were asked for, or else all; of a quick run those that fit its time.
func (o *Options) handoffCases() (cases []handoffCase, err error) {
	names := o.Cases
	if len(names) == 0 {
		names = usualHandoffs(o.Quick)
	}
	for _, name := range names {
		c, err := parseHandoffCase(name)
		if err != nil {
			return nil, err
		}
		cases = append(cases, c)
	}
	// Those with as many starts at once share a deployment, whose pool has that size.
	slices.SortStableFunc(cases, func(a, b handoffCase) int { return a.n - b.n })
	return slices.Compact(cases), nil
}

func usualHandoffs(quick bool) (names []string) {
	for _, n := range []int{1, 10, 50} {
		if quick && n > 1 {
			return append(names, "image/sandbox/10")
		}
		names = append(names, fmt.Sprintf("image/sandbox/%d", n), fmt.Sprintf("image/revision/%d", n))
		for _, runtime := range Runtimes() {
			names = append(names, fmt.Sprintf("%s/runtime/%d", runtime, n), fmt.Sprintf("%s/revision/%d", runtime, n))
		}
	}
	return names
}
