package interop

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestImage(t *testing.T) {
	d := connect(t)
	ctx := context.Background()
	reference := needed(t, "VMRT_TEST_PULL_IMAGE")
	spec := &runtimeapi.ImageSpec{Image: reference}
	id, err := d.images.PullImage(ctx, spec, nil, sandboxConfig(t, "pull"))
	if err != nil {
		t.Fatalf("PullImage: %v", err)
	}
	t.Cleanup(func() { _ = d.images.RemoveImage(context.Background(), spec) })

	status, err := d.images.ImageStatus(ctx, spec, true)
	if err != nil || status.Image == nil {
		t.Fatalf("ImageStatus: %v, %v", status, err)
	}
	image := status.Image
	equal(t, "id", image.Id, id)
	if !slices.Contains(image.RepoTags, reference) {
		t.Errorf("%s is not in %v", reference, image.RepoTags)
	}
	if len(image.RepoDigests) == 0 {
		t.Error("no digest is told")
	}
	if len(status.Info) == 0 {
		t.Error("verbose status has no info")
	}

	t.Run("all-references", func(t *testing.T) {
		names := append([]string{image.Id, strings.TrimPrefix(image.Id, "sha256:")}, image.RepoTags...)
		for _, name := range append(names, image.RepoDigests...) {
			other, err := d.images.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: name}, false)
			if err != nil || !proto.Equal(other.Image, image) {
				t.Errorf("%s: %v, %v", name, other, err)
			}
		}
	})
	t.Run("list", func(t *testing.T) {
		for name, filter := range map[string]*runtimeapi.ImageFilter{"all": nil, "one": {Image: spec}} {
			images, err := d.images.ListImages(ctx, filter)
			if err != nil {
				t.Fatal(err)
			}
			count := 0
			for _, each := range images {
				if each.Id == id {
					count++
				}
			}
			equal(t, name+": entries", count, 1)
		}
	})
	t.Run("pull-again", func(t *testing.T) {
		again, err := d.images.PullImage(ctx, spec, nil, nil)
		if err != nil || again != id {
			t.Errorf("%s, %v", again, err)
		}
	})
	t.Run("file-system", func(t *testing.T) {
		info, err := d.images.ImageFsInfo(ctx)
		if err != nil || len(info.ImageFilesystems) != 1 {
			t.Fatalf("ImageFsInfo: %v, %v", info, err)
		}
		usage := info.ImageFilesystems[0]
		if usage.Timestamp == 0 || usage.UsedBytes.GetValue() < image.Size || !strings.HasPrefix(usage.FsId.Mountpoint, "/") {
			t.Errorf("%v, with an image of %d octets", usage, image.Size)
		}
	})
	t.Run("bad-reference", func(t *testing.T) {
		for _, name := range []string{"UPPER CASE", "", "x@sha256:123"} {
			_, err := d.images.PullImage(ctx, &runtimeapi.ImageSpec{Image: name}, nil, nil)
			refused(t, err, codes.InvalidArgument)
		}
	})
	t.Run("absent-in-registry", func(t *testing.T) {
		absent := reference[:strings.LastIndex(reference, ":")] + ":no-such-tag"
		if _, err := d.images.PullImage(ctx, &runtimeapi.ImageSpec{Image: absent}, nil, nil); err == nil {
			t.Errorf("%s could be pulled", absent)
		}
		if status, err := d.images.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: absent}, false); err != nil || status.Image != nil {
			t.Errorf("%v, %v", status, err)
		}
	})
	t.Run("remove", func(t *testing.T) {
		for range 2 {
			if err := d.images.RemoveImage(ctx, spec); err != nil {
				t.Fatalf("RemoveImage: %v", err)
			}
		}
		if status, err := d.images.ImageStatus(ctx, spec, false); err != nil || status.Image != nil {
			t.Errorf("still there: %v, %v", status, err)
		}
	})
}
