"""Pictures and the tars they lie in.

A shard is a WebDataset tar as img2dataset writes it. One sample is one picture, however many captions it has:

    KEY.jpg    the picture (jpg, png, webp, …)
    KEY.txt    its first caption
    KEY.json   {"url": …, "sha256": …, "caption": first, "captions": [first, second, …], …img2dataset's other fields}

`captions` may be missing: then the sample has one caption, that of KEY.txt, or of `caption` where there is no KEY.txt.
It counts if it is a list of strings whose first is KEY.txt's (a tar whose texts were rewritten elsewhere keeps a stale
list in its JSON). NNNNN.parquet beside the tar, img2dataset's metadata, has one row a picture and, where any picture of
the shard has several captions, a column `captions`: list of string. NNNNN_stats.json counts pictures, not captions.

Each (picture, caption) is one input of `embed` and ends as one row or one Reject, so that fates add up in pairs, as the
rows of a URL list do. The picture is decoded and run through the image tower once. The rows of one sample are
neighbours and share key, url, image_sha256, thumbnail and image_embedding; their uids differ by caption. So within a
shard a key names a picture, not a row: who joins on it must expect several rows; (part, row) is a row's address.
"""
